"""The gate for weights that leave: see `dmf.export.weights`."""
