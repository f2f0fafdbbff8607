"""What the commands do: call the library and print what it returned. Heavy imports live inside the bodies."""
