"""From a training configuration to Slurm jobs: settings, a readable script, submission, following.

``cluster`` holds the settings, ``sweep`` the runs of one launch, ``script`` renders the job script
around ``job.sh``, ``slurm`` talks to Slurm, ``node`` starts the ranks of a node inside a job.
"""
