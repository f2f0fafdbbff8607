"""`python -m ptq161` is the command `ptq161`."""

import sys

from ptq161.cli import main

if __name__ == "__main__":
    sys.exit(main())
