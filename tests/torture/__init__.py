"""Campaigns that try to lose files, serve broken bundles or crash: `make torture`. Short forms run with the tests."""
