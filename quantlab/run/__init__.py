"""Makes artifacts: blocks in order, layer edits, journal, identity, manifest and model card."""
