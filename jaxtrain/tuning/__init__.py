"""Search for hyper-parameters: trials that share data and compiled programs, in a study of Optuna."""
