//! P5, as far as it is about going on: when most machines fail at once, as in an outage of the power, and one of them never comes
//! back, everything can be read and written as soon as the others are back. Nobody does anything for it.

use super::healed_when_calm::HEALED_WITHIN;
use crate::sim::guests::Load;

/// Waits until every block can be written and read without the machine that was lost; else why it cannot.
pub async fn violations(load: &Load, lost: usize) -> Vec<String> {
    let deadline = tokio::time::Instant::now() + HEALED_WITHIN;
    loop {
        let Err(error) = load.work_without(lost).await else { return Vec::new() };
        if tokio::time::Instant::now() > deadline {
            return vec![format!(
                "outage: the others do not go on without node {lost} within {HEALED_WITHIN:?}: {error}"
            )];
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
}
