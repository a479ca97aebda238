"""r1fast's losses under the names and signatures of Liger Kernel, TRL and verl.

Each module stands alone and imports its peer, if at all, when it is first used.
"""
