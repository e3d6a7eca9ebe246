"""`fairlane bench`: Fairlane beside what a shop would use instead, on the same servers, in the same run."""
