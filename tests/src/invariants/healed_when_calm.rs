//! P5, as far as it is about coming back: once all machines run and all links work, every node serves, all of them are members
//! of one epoch, and recovery ends. Nobody does anything for it.

use std::time::Duration;

use crate::sim::client::{SimClient, within};
use crate::sim::net::SimNet;

/// How long healing may take, simulated. Timers of the cluster's own are below 10 s; the rest is for recovery.
pub const HEALED_WITHIN: Duration = Duration::from_mins(2);
const LOOK_AGAIN: Duration = Duration::from_millis(250);
const PATIENCE: Duration = Duration::from_secs(5);

/// Waits until every node of `count` says that all is well, three times in a row; else what is missing.
pub async fn violations(net: &SimNet, count: usize) -> Vec<String> {
    let waiting = async {
        let mut calm = 0;
        let mut last = Vec::new();
        let deadline = tokio::time::Instant::now() + HEALED_WITHIN;
        loop {
            let mut missing = Vec::new();
            let mut epochs = Vec::new();
            for host in 0..count {
                match within(PATIENCE, state(net, host, count)).await {
                    Ok(Ok(epoch)) => epochs.push(epoch),
                    Ok(Err(what)) => missing.push(format!("node {host} {what}")),
                    Err(error) => missing.push(format!("node {host} does not answer: {error}")),
                }
            }
            if epochs.windows(2).any(|pair| pair[0] != pair[1]) {
                missing.push(format!("the nodes are in epochs {epochs:?}"));
            }
            calm = if missing.is_empty() { calm + 1 } else { 0 };
            if calm == 3 {
                return Vec::new();
            }
            if !missing.is_empty() {
                last = missing;
            }
            if tokio::time::Instant::now() > deadline {
                return last;
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    };
    let missing = waiting.await;
    missing.into_iter().map(|what| format!("healed when calm: {what} after {HEALED_WITHIN:?}")).collect()
}

/// The epoch of a node that has nothing left to do, or what it has.
async fn state(net: &SimNet, host: usize, count: usize) -> std::io::Result<Result<u64, String>> {
    let mut client = SimClient::connect(net, host).await?;
    let report = client.report().await?;
    if report["phase"] != "running" {
        return Ok(Err(format!("is {}: {}", report["phase"], report["order"]["needed"])));
    }
    if report["recovering"] != false {
        return Ok(Err("recovers".to_owned()));
    }
    let members = client.node_count().await?;
    if members != count {
        return Ok(Err(format!("sees {members} members of {count}")));
    }
    Ok(Ok(report["epoch"].as_u64().unwrap_or(0)))
}
