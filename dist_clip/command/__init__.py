"""The command ``dist-clip``: reports on runs, what a configuration means, and what works on this machine."""
