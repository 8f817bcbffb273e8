//! Ratios of interleaved pairs: the median, and how far it can be trusted.

use serde::Serialize;

/// Resamplings of the bootstrap.
const RESAMPLES: usize = 4_000;

/// A ratio: the median over its pairs, with its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Ratio {
    /// The median.
    pub median: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end.
    pub high: f64,
    /// Number of pairs.
    pub pairs: usize,
}

impl Ratio {
    /// The ratios of pairs `(loaded, not loaded)`; `None` without a pair.
    pub fn of(pairs: &[(f64, f64)]) -> Option<Self> {
        let ratios: Vec<f64> = pairs.iter().map(|(loaded, bare)| loaded / bare).collect();
        let (low, high) = bootstrap(&ratios)?;
        Some(Self { median: median(&ratios)?, low, high, pairs: ratios.len() })
    }

    /// True if the whole interval lies above the bound: only then is the bound missed for certain.
    pub fn misses(&self, bound: f64) -> bool {
        self.low > bound
    }
}

impl std::fmt::Display for Ratio {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.3} [{:.3}, {:.3}]", self.median, self.low, self.high)
    }
}

/// The median; `None` of nothing.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        n if n % 2 == 1 => Some(sorted[middle]),
        _ => Some(f64::midpoint(sorted[middle - 1], sorted[middle])),
    }
}

/// The percentile bootstrap of the median: 2.5 % of the resampled medians lie outside on either side.
fn bootstrap(values: &[f64]) -> Option<(f64, f64)> {
    // A fixed seed: the same pairs give the same interval.
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut resample = vec![0.0; values.len()];
    let mut medians = Vec::with_capacity(RESAMPLES);
    for _ in 0..RESAMPLES {
        for value in &mut resample {
            // xorshift64 (Marsaglia 2003).
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            *value = values[(random % values.len() as u64) as usize];
        }
        medians.push(median(&resample)?);
    }
    medians.sort_by(f64::total_cmp);
    Some((medians[RESAMPLES / 40], medians[RESAMPLES - 1 - RESAMPLES / 40]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_lies_between_the_middle_two() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 3.0, 2.0]), Some(2.5));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn a_clear_excess_misses_the_bound_and_a_noisy_one_does_not() {
        let pairs: Vec<_> = (0..11).map(|n| (1200.0 + f64::from(n), 1000.0)).collect();
        let ratio = Ratio::of(&pairs).unwrap();
        assert!(ratio.misses(1.10) && !ratio.misses(1.25), "{ratio}");
        let noisy: Vec<_> = (0..11).map(|n| (if n % 2 == 0 { 1500.0 } else { 1000.0 }, 1000.0)).collect();
        let ratio = Ratio::of(&noisy).unwrap();
        assert!(ratio.median > 1.10 && !ratio.misses(1.10), "{ratio}");
    }

    #[test]
    fn the_interval_holds_the_median() {
        let pairs: Vec<_> = (0..21).map(|n| (1000.0 + f64::from((n * 7919) % 211), 1000.0)).collect();
        let ratio = Ratio::of(&pairs).unwrap();
        assert!(ratio.low <= ratio.median && ratio.median <= ratio.high && ratio.low < ratio.high, "{ratio}");
    }
}
