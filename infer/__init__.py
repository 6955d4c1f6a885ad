"""Stage 3: a base model and adapters make videos."""
