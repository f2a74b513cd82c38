"""The geometry room: quaternions (xyzw), poses and chunks of poses, camera windows, oriented boxes.

Plain torch functions without state; every other room may use them, and they use none. Nothing is imported here:
simulating processes read `cameras` alone, which does without torch.
"""
