//! The bar that shows how far a long transfer is. Nothing is drawn unless somebody watches.
//!
//! Always holds: what is drawn is exactly as wide as the terminal, and a finished bar ends with a newline.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use sheep_core::units::HumanSize;

/// Columns beside the bar: percentage, brackets and the two amounts.
const BESIDE_BAR: usize = 30;
/// Drawing more often is work that nobody sees.
const DRAW_INTERVAL: Duration = Duration::from_millis(100);

/// What is counted.
#[derive(Clone, Copy)]
enum Unit {
    Bytes,
    Objects,
}

/// A bar on standard error, if that is a terminal.
pub struct Progress {
    columns: Option<usize>,
    unit: Unit,
    done: u64,
    total: u64,
    drawn: Option<Instant>,
}

impl Progress {
    /// A bar for `total` bytes.
    pub fn new(total: u64) -> Progress {
        Progress::counting(Unit::Bytes, total)
    }

    /// A bar for `total` objects.
    pub fn of_objects(total: u64) -> Progress {
        Progress::counting(Unit::Objects, total)
    }

    fn counting(unit: Unit, total: u64) -> Progress {
        let columns = io::stderr()
            .is_terminal()
            .then(|| rustix::termios::tcgetwinsize(io::stderr()).map_or(0, |size| usize::from(size.ws_col)))
            .filter(|&columns| columns > BESIDE_BAR);
        Progress { columns, unit, done: 0, total, drawn: None }
    }

    /// No bar, because standard output is shown on the same terminal.
    pub fn hidden() -> Progress {
        Progress { columns: None, unit: Unit::Bytes, done: 0, total: 0, drawn: None }
    }

    /// So many more are done.
    pub fn advance(&mut self, count: u64) {
        self.done = (self.done + count).min(self.total);
        let Some(columns) = self.columns else { return };
        let is_end = self.done == self.total;
        if !is_end && self.drawn.is_some_and(|drawn| drawn.elapsed() < DRAW_INTERVAL) {
            return;
        }
        self.drawn = Some(Instant::now());
        let end = if is_end { "\n" } else { "" };
        // A terminal that is gone is no reason to stop the transfer.
        let _ = write!(io::stderr(), "\r{}{end}", bar(self.unit, self.done, self.total, columns));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        let is_unfinished = self.drawn.is_some() && self.done < self.total;
        if is_unfinished {
            let _ = writeln!(io::stderr());
        }
    }
}

fn bar(unit: Unit, done: u64, total: u64, columns: usize) -> String {
    let width = columns.saturating_sub(BESIDE_BAR).max(1);
    let share = if total == 0 { 1.0 } else { done as f64 / total as f64 };
    let filled = ((share * width as f64) as usize).min(width);
    let mut line = "=".repeat(filled);
    if filled < width {
        line.push('>');
    }
    let amounts = match unit {
        Unit::Bytes => format!("{} / {}", HumanSize(done), HumanSize(total)),
        Unit::Objects => format!("{done} / {total}"),
    };
    let text = format!("{:5.1} % [{line:<width$}] {amounts}", share * 100.0);
    let shown: String = text.chars().take(columns).collect();
    format!("{shown:<columns$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_fills_its_terminal() {
        let mib = 1 << 20;
        assert_eq!(bar(Unit::Bytes, 0, 8 * mib, 40), "  0.0 % [>         ] 0.0 MB / 8.0 MB    ");
        assert_eq!(bar(Unit::Bytes, 4 * mib, 8 * mib, 40), " 50.0 % [=====>    ] 4.0 MB / 8.0 MB    ");
        assert_eq!(bar(Unit::Bytes, 8 * mib, 8 * mib, 40), "100.0 % [==========] 8.0 MB / 8.0 MB    ");
        assert_eq!(bar(Unit::Bytes, 0, 0, 40).len(), 40);
        assert_eq!(bar(Unit::Objects, 3, 6, 40), " 50.0 % [=====>    ] 3 / 6              ");
    }
}
