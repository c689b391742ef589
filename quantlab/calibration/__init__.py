"""Passes text through one decoder layer at a time and collects statistics of the inputs of its linears."""
