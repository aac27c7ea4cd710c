//! Looks for nodes on the local network by multicast DNS, the way a daemon does: `neighbours NAME PORT [SECONDS]`. For
//! finding out whether a network lets multicast through.

use std::time::Duration;

use sheep::world::World;
use sheep::world::net::Announcement;

#[tokio::main(flavor = "current_thread")]
async fn main() -> std::io::Result<()> {
    tracing_subscriber::fmt().with_max_level(tracing::Level::WARN).init();
    let mut arguments = std::env::args().skip(1);
    let name = arguments.next().unwrap_or_else(|| "probe".into());
    let port = arguments.next().and_then(|text| text.parse().ok()).unwrap_or(7010);
    let seconds = arguments.next().and_then(|text| text.parse().ok()).unwrap_or(10);
    let world = World::real(1)?;
    println!("{name}: this machine's addresses: {:?}", world.net.local_addresses()?);
    let properties = vec![("cluster".to_string(), "none".to_string())];
    let mut neighbours = world.net.neighbours(&Announcement { name: name.clone(), port, properties })?;
    let end = world.clock.monotonic() + Duration::from_secs(seconds);
    while world.clock.monotonic() < end {
        tokio::select! {
            seen = neighbours.next() => println!("{name} {:.1} s: {:?}", world.clock.monotonic().as_secs_f64(), seen?),
            () = world.clock.sleep(end.saturating_sub(world.clock.monotonic())) => {}
        }
    }
    drop(neighbours);
    // Time for the good-bye.
    world.clock.sleep(Duration::from_millis(300)).await;
    println!("{name}: done, {} threads", std::fs::read_dir("/proc/self/task")?.count());
    Ok(())
}
