//! Latency over load: durable writes and reads of 4 KiB at one depth after the other, ours and qemu-nbd in turn.

use std::time::Duration;

use anyhow::Result;
use serde_json::{Value, json};

use super::comparison::measure;
use super::figures::Figures;
use super::load::Load;
use super::patterns::{Mix, Pattern, Volume};
use super::rig::Rig;

const DEPTHS: [usize; 7] = [1, 2, 4, 8, 16, 32, 64];
/// Of each point: some thousands of requests at the lowest depth.
const TIME: Duration = Duration::from_millis(1500);
/// More than fit into that time.
const OPERATIONS_MAX: u64 = 1_000_000;

/// The two panels of the plot.
pub const LOADS: [(&str, Mix); 2] =
    [("4 KiB random writes, durable", Mix::Durable), ("4 KiB random reads", Mix::Reads)];

/// One depth of one of [`LOADS`].
pub struct Point {
    /// Which of them.
    pub load: usize,
    /// Whether it is ours, else that of qemu-nbd.
    pub is_ours: bool,
    /// Requests under way.
    pub depth: usize,
    /// What came of it.
    pub figures: Figures,
}

/// Measures all points.
pub fn run(rig: &mut Rig, is_quick: bool) -> Result<Vec<Point>> {
    let mut points = Vec::new();
    for (index, (name, mix)) in LOADS.iter().enumerate() {
        println!(
            "\n{name}\n{:>6} {:>9} {:>8} {:>8} | {:>9} {:>8} {:>8}",
            "depth", "sheep/s", "p50 us", "p99", "nbd/s", "p50 us", "p99"
        );
        for depth in DEPTHS {
            let pattern = Pattern::of_depth(*mix, depth, OPERATIONS_MAX);
            let requests = pattern.requests(rig.size_bytes(Volume::Full), false);
            let payload = pattern.payload();
            let time_max = if is_quick { TIME / 4 } else { TIME };
            let load = Load { pattern: &pattern, operations: &requests, payload: &payload, time_max };
            let ours = measure(&mut *rig.ours(Volume::Full)?, &load, &rig.our_pids())?;
            let theirs = measure(&mut *rig.theirs(Volume::Full)?, &load, &[rig.their_pid(Volume::Full)])?;
            println!(
                "{depth:>6} {:>9.0} {:>8.0} {:>8.0} | {:>9.0} {:>8.0} {:>8.0}",
                ours.per_second,
                ours.latency_us[0],
                ours.latency_us[2],
                theirs.per_second,
                theirs.latency_us[0],
                theirs.latency_us[2]
            );
            points.push(Point { load: index, is_ours: true, depth, figures: ours });
            points.push(Point { load: index, is_ours: false, depth, figures: theirs });
        }
    }
    Ok(points)
}

/// For a file.
pub fn json(points: &[Point]) -> Value {
    let point = |point: &Point| {
        let who = if point.is_ours { "sheep" } else { "qemu_nbd" };
        json!({"load": LOADS[point.load].0, "of": who, "depth": point.depth, "figures": point.figures.json()})
    };
    points.iter().map(point).collect()
}
