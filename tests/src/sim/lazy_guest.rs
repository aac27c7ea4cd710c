//! A guest that writes without waiting for the disks, as most do, and flushes now and then. It has its volume to itself.
//! Of what it was promised it remembers a [`Promise`] for each block.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::Random;
use super::client::{SimClient, within};
use super::guests::{CONNECT_PATIENCE, Load, PATIENCE};
use crate::linear::Action;
use crate::promise::Promise;

/// Works until told to stop; then flushes what it can. Notes what must not have been read.
pub async fn run(load: Load, seed: u64) {
    let mut random = Random::new(seed);
    let mut promises: BTreeMap<u32, Promise> = BTreeMap::new();
    let mut connection = 0;
    while !load.stop.load(Ordering::Relaxed) {
        connection += 1;
        let host = random.below(load.host_count as u64) as usize;
        let Ok(mut client) = within(CONNECT_PATIENCE, SimClient::connect(&load.net, host)).await else {
            tokio::time::sleep(Duration::from_millis(1 + random.below(50))).await;
            continue;
        };
        for _ in 0..10 + random.below(300) {
            let stopped = load.stop.load(Ordering::Relaxed);
            if stopped || step(&load, &mut client, &mut promises, connection, &mut random).await.is_err() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(random.below(load.rest_ms + 1))).await;
        }
    }
    // When all is well again every block must hold one of those that it may.
    while !load.is_healed.load(Ordering::Relaxed) {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let reading = async {
        let mut client = within(PATIENCE, SimClient::connect(&load.net, 0)).await?;
        for (block, promise) in &promises {
            read(&load, &mut client, *block, promise).await?;
        }
        Ok::<_, io::Error>(())
    };
    if let Err(error) = reading.await {
        load.oracle.add_broken(format!("healed when calm: the volume that is written lazily cannot be read: {error}"));
    }
}

async fn step(
    load: &Load,
    client: &mut SimClient,
    promises: &mut BTreeMap<u32, Promise>,
    connection: u64,
    random: &mut Random,
) -> io::Result<()> {
    let block = random.below(load.disk.block_count().into()) as u32;
    match random.below(10) {
        0..6 => {
            let value = load.oracle.next_value();
            let promise = promises.entry(block).or_default();
            let written = within(PATIENCE, load.disk.write_lazily(client, block, value)).await;
            match &written {
                Ok(()) => promise.acknowledged(value, connection),
                Err(_) => promise.unanswered(value),
            }
            written
        }
        6..9 => read(load, client, block, promises.entry(block).or_default()).await,
        _ => {
            within(PATIENCE, load.disk.flush(client)).await?;
            for promise in promises.values_mut() {
                promise.flushed(connection);
            }
            Ok(())
        }
    }
}

async fn read(load: &Load, client: &mut SimClient, block: u32, promise: &Promise) -> io::Result<()> {
    let found = within(PATIENCE, load.disk.read(client, block)).await?;
    let values = match found {
        Ok(Action::ReadTorn(values)) => values.to_vec(),
        Ok(Action::Read(value) | Action::Write(value)) => vec![value],
        Err(what) => {
            load.oracle.add_foreign(what);
            return Ok(());
        }
    };
    load.net.note(values.iter().fold(block.into(), |sum, value| sum * 31 + value));
    if let Some(lost) = values.iter().find(|value| !promise.allows(**value)) {
        load.oracle.add_broken(format!(
            "flushed is kept: block {block} of the volume that is written lazily holds write {lost}; {promise}"
        ));
    }
    Ok(())
}
