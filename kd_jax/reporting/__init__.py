"""What came out of runs: tables, statistics, figures."""
