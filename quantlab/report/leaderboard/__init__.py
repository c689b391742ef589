"""The leaderboard: records of several runs in one ranked table."""
