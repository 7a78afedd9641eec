"""What every training loop here calls alike and no one paper is about."""
