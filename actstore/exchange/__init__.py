"""Activations in other tools' files: `importer` makes stores of them, `exporter` writes them."""
