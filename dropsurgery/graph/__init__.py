"""Reading a network: traces, shapes, sites and channels. Nothing here changes one."""
