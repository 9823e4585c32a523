"""The stages of a bulk run, each a callable class that Ray Data runs in processes of its own."""
