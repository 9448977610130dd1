"""A run, written down while it runs and shown afterwards: `RunRecorder`, `plot_run`, `write_report`."""
