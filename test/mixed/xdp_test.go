//go:build linux && peers

package mixed_test

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weft-net/weft/dataplane"
	"github.com/weft-net/weft/test/lab"
)

// Weft strips in its uplink's driver what stock flanneld sends. Everybody reaches
// everybody, and nothing is lost while the program comes to the driver and goes. The
// wire is of cards, where there are some.
func TestStrippingWhatFlanneldSends(t *testing.T) {
	_, l := newLab(t, lab.Options{
		Store: lab.StoreEtcd, Kinds: []lab.Kind{lab.Weft, lab.Flanneld}, AgentFlags: []string{"--xdp=auto"},
	}.OnCards())
	n, peer := l.Node(1), l.Node(2)
	mustReachAll(t, l)
	if x := mustXDP(t, n); strings.Contains(x.Reason, "needs Linux 6.6") {
		t.Skip("this kernel strips nothing, everybody reaches everybody: " + x.Reason)
	}
	var before dataplane.XDP
	lab.T(t).Eventually(10*time.Second, func() error {
		if err := ping(t.Context(), l.Pod(1, 1), l.Pod(2, 1).IP, 62); err != nil {
			return err
		}
		if before = mustXDP(t, n); !before.Attached || !before.Heard {
			return fmt.Errorf("it does not strip: %+v", before)
		}
		return nil
	})
	came := mustCounted(t, n, peer.IP)
	for range 3 {
		mustReachAll(t, l)
	}
	stripped, all := mustXDP(t, n).Stripped-before.Stripped, mustCounted(t, n, peer.IP).RxPackets-came.RxPackets
	t.Logf("%d packets came, %d were stripped in the driver", all, stripped)
	if all < 100 || stripped < all/2 {
		t.Errorf("of %d packets %d were stripped in the driver, want most", all, stripped)
	}

	// As fast as an emulated machine can.
	lives := mustStream(t, route{l.Pod(2, 1), l.Pod(1, 1)}, false)
	arrives := mustProbe(t, route{l.Pod(2, 1), l.Pod(1, 1)}, lab.ProbeOptions{Interval: 50 * time.Millisecond})
	for _, xdp := range []string{"off", "auto"} {
		stop(t, n, syscall.SIGTERM)
		must(t, n.StartAgent(t.Context(), weft, "--xdp="+xdp))
		time.Sleep(time.Second)
		if x := mustXDP(t, n); x.Attached != (xdp == "auto") {
			t.Errorf("--xdp=%s: %+v", xdp, x)
		}
	}
	arrives()
	lives()
}

// mustXDP is what a node says of its uplink's driver.
func mustXDP(tb testing.TB, n *lab.Node) dataplane.XDP {
	tb.Helper()
	var answer struct{ Report dataplane.Report }
	mustJSON(tb, n, &answer, "status")
	return answer.Report.XDP
}
