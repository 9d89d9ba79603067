"""Other tools hand over what they pruned, and take what we made: the real packages where they install."""
