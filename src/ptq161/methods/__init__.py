"""The methods by name: read top to bottom. Each turns one decoder block into quantized weights.

METHODS have a packed format: `quantize --method` takes them. BASELINES have none: they are compared with. A
baseline's name says its setting: w2g128 is 2 bits in groups of 128 channels, w2 the same with one group per row.
"""

from ptq161.methods.awq import Awq
from ptq161.methods.baseline import Baseline
from ptq161.methods.billm import BiLlm
from ptq161.methods.gptq import Gptq
from ptq161.methods.mixed import mixed
from ptq161.methods.omniquant import OmniQuant
from ptq161.methods.owq import Owq
from ptq161.methods.pb_llm import PbLlm
from ptq161.methods.ptq161 import ptq161
from ptq161.methods.quip import Quip
from ptq161.methods.result import BlockResult, Method
from ptq161.methods.rtn import RoundToNearest
from ptq161.methods.smoothquant import SmoothQuant

__all__ = ["BASELINES", "METHODS", "Baseline", "BlockResult", "Method"]

METHODS: dict[str, Method] = {
    "ptq161": ptq161,
    "mixed": mixed,
}

BASELINES: dict[str, Baseline] = {
    "rtn-w2": RoundToNearest(bits=2, group=None),
    "rtn-w2g128": RoundToNearest(bits=2, group=128),
    "gptq-w2": Gptq(bits=2, group=None),
    "gptq-w2g128": Gptq(bits=2, group=128),
    "gptq-w3g128": Gptq(bits=3, group=128),
    "gptq-w4g128": Gptq(bits=4, group=128),
    "billm": BiLlm(),
    "pb-llm": PbLlm(),
    "awq-w2g128": Awq(bits=2),
    "awq-w3g128": Awq(bits=3),
    "awq-w4g128": Awq(bits=4),
    "omniquant-w2g128": OmniQuant(bits=2, group=128),
    "omniquant-w2g64": OmniQuant(bits=2, group=64),
    "quip-w2": Quip(bits=2),
    "owq-w2": Owq(bits=2, target_bits=2.01),
    "owq-w3": Owq(bits=3, target_bits=3.01),
    "owq-w4": Owq(bits=4, target_bits=4.01),
    "smoothquant-w4a4": SmoothQuant(),
}
