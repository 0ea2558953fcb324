"""The sharding core: layouts, buffers, groups and the schedule of their collectives."""
