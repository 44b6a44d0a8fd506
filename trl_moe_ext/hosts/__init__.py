"""The only code that touches globals of another library: PEFT's registry, TRL's parser and `get_peft_config`."""
