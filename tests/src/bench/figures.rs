//! What is measured of a load, and how it is shown.

use std::time::Duration;

use serde_json::{Value, json};

use super::load::Samples;
use super::process::Io;

/// Shares of the requests of which the slowest is told.
pub const PERCENTILES: [(&str, f64); 4] = [("p50", 0.5), ("p95", 0.95), ("p99", 0.99), ("p999", 0.999)];

/// What a load gave, each per request unless it says otherwise.
#[derive(Clone, Default, Debug)]
pub struct Figures {
    /// Requests.
    pub per_second: f64,
    /// See [`PERCENTILES`].
    pub latency_us: [f64; 4],
    /// Microseconds of CPU of each server process.
    pub cpu_us: Vec<f64>,
    /// Resident memory of each server process afterwards, in all.
    pub resident_mib: Vec<f64>,
    /// System calls of all server processes together, if they can be counted.
    pub syscalls: Option<f64>,
    /// See [`Io`]; of all server processes together, in bytes.
    pub read: f64,
    /// See [`Io`].
    pub written: f64,
    /// See [`Io`].
    pub stored: f64,
}

/// Percentiles, in the order of [`PERCENTILES`].
pub fn percentiles(mut latencies: Vec<Duration>) -> [f64; 4] {
    latencies.sort();
    PERCENTILES.map(|(_, share)| {
        let index = (latencies.len().saturating_sub(1) as f64 * share) as usize;
        latencies.get(index).map_or(f64::NAN, |latency| latency.as_secs_f64() * 1e6)
    })
}

/// The middle of some values.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

impl Figures {
    /// Speed and times, without what processes took.
    pub fn of(samples: Samples) -> Figures {
        let per_second = samples.latencies.len() as f64 / samples.elapsed.as_secs_f64();
        Figures { per_second, latency_us: percentiles(samples.latencies), ..Figures::default() }
    }

    /// With what processes moved.
    #[must_use]
    pub fn with_io(mut self, before: Io, after: Io, count: f64) -> Figures {
        self.read = (after.read - before.read) as f64 / count;
        self.written = (after.written - before.written) as f64 / count;
        self.stored = (after.stored - before.stored) as f64 / count;
        self
    }

    /// Of several runs, each figure's median by itself.
    pub fn medians(runs: &[Figures]) -> Figures {
        let of = |value: &dyn Fn(&Figures) -> f64| median(runs.iter().map(value));
        let each = |list: &dyn Fn(&Figures) -> &Vec<f64>| {
            let count = runs.iter().map(|run| list(run).len()).min().unwrap_or(0);
            (0..count).map(|index| median(runs.iter().map(|run| list(run)[index]))).collect()
        };
        let counted: Vec<f64> = runs.iter().filter_map(|run| run.syscalls).collect();
        Figures {
            per_second: of(&|run| run.per_second),
            latency_us: std::array::from_fn(|index| median(runs.iter().map(|run| run.latency_us[index]))),
            cpu_us: each(&|run| &run.cpu_us),
            resident_mib: each(&|run| &run.resident_mib),
            syscalls: (!counted.is_empty()).then(|| median(counted)),
            read: of(&|run| run.read),
            written: of(&|run| run.written),
            stored: of(&|run| run.stored),
        }
    }

    /// All server processes.
    pub fn cpu_us_together(&self) -> f64 {
        self.cpu_us.iter().sum()
    }

    /// For a file.
    pub fn json(&self) -> Value {
        let mut object = json!({
            "per_second": self.per_second,
            "cpu_us": self.cpu_us, "cpu_us_together": self.cpu_us_together(), "resident_mib": self.resident_mib,
            "rchar_bytes": self.read, "wchar_bytes": self.written, "write_bytes": self.stored,
        });
        object["latency_us"] =
            PERCENTILES.iter().zip(self.latency_us).map(|((name, _), value)| (*name, value)).collect();
        if let Some(syscalls) = self.syscalls {
            object["syscalls"] = syscalls.into();
        }
        object
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_and_medians_take_from_what_is_there() {
        let latencies = (1..=1001).rev().map(Duration::from_micros).collect();
        assert_eq!(percentiles(latencies).map(|us| us.round() as u64)[..3], [501, 951, 991]);
        assert!(percentiles(Vec::new())[0].is_nan());
        let run = |per_second: f64, cpu: f64| Figures { per_second, cpu_us: vec![cpu, 1.0], ..Figures::default() };
        let middle = Figures::medians(&[run(1.0, 30.0), run(3.0, 20.0), run(2.0, 10.0)]);
        assert_eq!((middle.per_second as u64, middle.cpu_us[0] as u64, middle.syscalls), (2, 20, None));
    }
}
