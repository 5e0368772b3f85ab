"""The original models, reimplemented: one module per family, with the family's name.

Each module has

- ``build(sizes)``: builds the model on the current device, with the original's parameter names, so that
  ``load_state_dict(strict=True)`` accepts the original's file;
- ``load(repository, source, model)``: loads the published ``model`` through torch.hub, with its authors' own
  code and without weights;
- ``states(model, pixels, as_transformers)``: runs either of the two and yields the output of every layer.
"""
