"""The original models' own graphs, one module a family, under the family's name.

Each module has ``build(sizes)``, the model on the device that is current, with the original's
parameter names, so that ``load_state_dict(strict=True)`` takes the original's file.
"""
