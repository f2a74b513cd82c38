"""The embedded world: a table, objects and a gripper on MuJoCo's physics, seen without a display.

A reader may follow the light: `ray_camera` asks MuJoCo what each pixel sees, `patterns` and `shading` give it
colour, `shadows` takes the light away again, `ray_renderer` makes the pictures of all cameras of a moment, and
`egl_camera` is MuJoCo's own renderer where there is one. `labels` and `labelled_images` write down what is exactly
true of a scene; `depth_errors` makes it as wrong as a network would.
"""
