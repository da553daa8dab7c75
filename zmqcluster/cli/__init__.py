"""The command line: `python main.py distribute VERB …` and `python main.py crawl URL…`."""
