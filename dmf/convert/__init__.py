"""The gate for weights that others trained: see `dmf.convert.command`."""
