"""Stage 2: a snapshot becomes adapters."""
