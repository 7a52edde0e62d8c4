"""What the scripts that reproduce the paper's experiments share."""
