"""The original models' own graphs, one module a family, under the family's name.

Each module has

- ``build(sizes)``: the model on the device that is current, with the original's parameter names,
  so that ``load_state_dict(strict=True)`` takes the original's file;
- ``load(repository, source, model)``: the published ``model`` by its authors' own code, through
  torch.hub, without weights; and
- ``states(model, pixels, as_transformers)``: what either of the two computes on its way.
"""
