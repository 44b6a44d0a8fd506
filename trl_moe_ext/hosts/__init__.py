"""The only code that touches globals of another library: those of PEFT, TRL, transformers and accelerate."""
