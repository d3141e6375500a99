"""What `gpu_suite.py` and `gpu_run.sh` measured, as records, tables and pictures of one day."""
