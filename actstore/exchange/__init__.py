"""Activations in other tools' files: import and export."""
