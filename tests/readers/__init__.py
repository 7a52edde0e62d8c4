"""Any bytes whatever, given to any reader of files that others made, are read right or refused in one sentence."""
