//! Several connections that work on one list of jobs at the same time.
//!
//! Always holds:
//! 1. Results are taken in the order of the jobs.
//! 2. At most [`LANES_MAX`] times three results exist at a time, however long the list is.
//! 3. After the first failure no lane begins another job.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use crate::connect::Sheep;
use crate::exit::Failure;
use crate::meaning::Target;

/// Connections. With objects of 4 MiB this fills a 10 Gbit/s link at a millisecond for each; more would only cost memory.
pub const LANES_MAX: usize = 8;
/// Results that wait to be taken, of each lane.
const WAITING_MAX: usize = 1;

/// Does `work` for every job, and `take`s the results in order.
pub fn in_order<Job, Outcome>(
    target: Target,
    jobs: &(impl Iterator<Item = Job> + Clone + Send),
    work: impl Fn(&mut Sheep, Job) -> Result<Outcome, Failure> + Sync,
    mut take: impl FnMut(Outcome) -> Result<(), Failure>,
) -> Result<(), Failure>
where
    Outcome: Send,
{
    let lane_count = jobs.clone().take(LANES_MAX).count();
    if lane_count == 0 {
        return Ok(());
    }
    thread::scope(|scope| {
        let work = &work;
        let mut lanes: Vec<Receiver<Result<Outcome, Failure>>> = Vec::with_capacity(lane_count);
        for lane in 0..lane_count {
            let (sender, receiver) = sync_channel(WAITING_MAX);
            let jobs = jobs.clone().skip(lane).step_by(lane_count);
            scope.spawn(move || run_lane(target, jobs, work, &sender));
            lanes.push(receiver);
        }
        // Job k is in lane k modulo their number: the first lane that has no more was the last one's successor.
        for lane in lanes.iter().cycle() {
            match lane.recv() {
                Ok(outcome) => take(outcome?)?,
                Err(_) => break,
            }
        }
        Ok(())
    })
}

fn run_lane<Job, Outcome>(
    target: Target,
    jobs: impl Iterator<Item = Job>,
    work: impl Fn(&mut Sheep, Job) -> Result<Outcome, Failure>,
    sender: &SyncSender<Result<Outcome, Failure>>,
) {
    let mut sheep = match Sheep::connect(target) {
        Ok(sheep) => sheep,
        Err(failure) => {
            // Nobody listens any more only if another lane has failed already.
            let _ = sender.send(Err(failure));
            return;
        }
    };
    for job in jobs {
        let outcome = work(&mut sheep, job);
        let failed = outcome.is_err();
        if sender.send(outcome).is_err() || failed {
            return;
        }
    }
}
