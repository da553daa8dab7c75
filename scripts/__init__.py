"""Tools around the cluster: the dev loop, the demo, local sites, measurements."""
