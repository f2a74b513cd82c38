"""The labelling room: ordinary images become 3D labels (spec section 6).

`records` says what a label is, `store` how labels lie on disk, `object_label` how points and a mask become one.
`pipeline` leads images through the steps, each behind an interface of its own: `sources` (and `video_source`),
`detector` (`gemini`, `local_detectors`), `segmenter` (`sam2`), `geometry`; `commands` is `spear label`.
"""
