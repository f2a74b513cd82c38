"""The labelling room: ordinary images become 3D labels (spec section 6).

`records` says what a label is, `store` how labels lie on disk, `object_label` how points and a mask become one.
"""
