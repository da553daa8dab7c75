"""One checked configuration out of a JSON file, the environment and command line flags."""

from zmqcluster.config.keys import DEFAULTS, KEYS, ClusterConfig, Key
from zmqcluster.config.load import load_config, read_file, shown

__all__ = ["DEFAULTS", "KEYS", "ClusterConfig", "Key", "load_config", "read_file", "shown"]
