"""The numbers of the rules for which there is a kernel."""

GLOBAL_NORM, ADAGC, LOGCLIP, ZCLIP = 0, 1, 2, 3
"""What each needs beside norms, in this order:

    rule         state                                            parameters
    GLOBAL_NORM  none                                             max_norm
    ADAGC        gamma fp32                                       lambda_rel, beta, eps
    LOGCLIP      level fp32, count int32, streak int32            ratio, power, rate, patience
    ZCLIP        mean float64, var float64, count int64           alpha, z_thresh, warmup_steps, percentile, to_mean,
                                                                  clip_factor, max_norm or -1, skip_update_on_spike, eps
"""
