package kube

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/klog/v2"
)

// clientOf makes a client of a server of the test's own.
func clientOf(t *testing.T, url string) *client {
	t.Helper()
	o := sound(t)
	o.APIURL = url
	c, err := newClient(o)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestWatchThatIsCutOffIsNoWatch(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			conn.Close()
		}
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if w, err := clientOf(t, "http://"+l.Addr().String()).watch(ctx, metav1.ListOptions{}); err == nil || ctx.Err() != nil {
		t.Errorf("watch is %v, %v", w, err)
	}
}

func TestHowTheAPIIsAsked(t *testing.T) {
	var asked []http.Header
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		asked = append(asked, q.Header)
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write([]byte(`{"kind":"Node","apiVersion":"v1","metadata":{"name":"self"}}`))
	}))
	defer server.Close()
	c := clientOf(t, server.URL)
	if n, err := c.node(t.Context(), "self"); err != nil || n.Name != "self" {
		t.Errorf("a Node in JSON is read as %v, %v", n, err)
	}
	if _, err := c.patch(t.Context(), "self", []byte("{}")); err != nil {
		t.Error(err)
	}
	for i, contentType := range []string{"", "application/strategic-merge-patch+json"} {
		h := asked[i]
		if got := h.Get("User-Agent"); got != "weft/1.2.3" {
			t.Errorf("user agent is %s", got)
		}
		if got := h.Get("Accept"); !strings.HasPrefix(got, "application/vnd.kubernetes.protobuf,") {
			t.Errorf("accepted is %s", got)
		}
		if got := h.Get("Content-Type"); got != contentType {
			t.Errorf("content type is %s", got)
		}
	}
}

func TestHeartbeatsAreNoNudges(t *testing.T) {
	nudges := 0
	n := newNodes(readerOf(t, confV4), func() { nudges++ })
	other := func(text string) *corev1.Node {
		o := kubeNode("b", []string{"10.244.2.0/24"}, stock("192.0.2.2", "0a:00:00:00:00:02"))
		o.ResourceVersion = text
		o.Annotations["example.com/changes"] = text
		o.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Message: text}}
		return o
	}
	if err := n.Replace([]any{other("1")}, "1"); err != nil {
		t.Fatal(err)
	}
	nudges = 0
	_, before := n.Own()
	for _, text := range []string{"2", "3"} {
		if err := n.Update(other(text)); err != nil {
			t.Fatal(err)
		}
	}
	if _, after := n.Own(); nudges != 0 || after != before {
		t.Errorf("%d nudges, generation %d after %d", nudges, after, before)
	}
	// A node that takes no part may come, change and go.
	stranger := kubeNode("c", []string{"10.244.3.0/24"}, nil)
	for _, do := range []func(any) error{n.Add, n.Update, n.Delete} {
		if err := do(stranger); err != nil {
			t.Fatal(err)
		}
	}
	if nudges != 0 {
		t.Errorf("%d nudges by a node that takes no part", nudges)
	}
	if err := n.Delete(other("4")); err != nil || nudges != 1 {
		t.Errorf("%d nudges by a node that goes, %v", nudges, err)
	}
	if err := n.Update(&corev1.Pod{}); err == nil {
		t.Error("a Pod is a Node")
	}
}

func TestClientGoIsHeardForDebuggingOnly(t *testing.T) {
	for level, lines := range map[slog.Level]int{slog.LevelInfo: 0, slog.LevelDebug: 2} {
		var text bytes.Buffer
		l := quietLogger(slog.New(slog.NewTextHandler(&text, &slog.HandlerOptions{Level: level})))
		l.WithName("reflector").WithValues("a", 1).Error(errors.New("no"), "Failed to watch")
		l.Info("something")
		if got := text.String(); strings.Count(got, "\n") != lines || strings.Count(got, "level=DEBUG") != lines {
			t.Errorf("at %s: %s", level, got)
		}
	}
}

// What client-go logs without a logger of ours would go to stderr.
func TestClientGoIsHeardWhereItIsOnItsOwn(t *testing.T) {
	defer klog.ClearLogger()
	for level, lines := range map[slog.Level]int{slog.LevelInfo: 0, slog.LevelDebug: 2} {
		var text bytes.Buffer
		TakeLogs(slog.New(slog.NewTextHandler(&text, &slog.HandlerOptions{Level: level})))
		klog.TODO().Error(errors.New("no"), "Unable to rotate token")
		klog.Errorf("Expected to load root CA config")
		if got := text.String(); strings.Count(got, "\n") != lines || strings.Count(got, "level=DEBUG") != lines {
			t.Errorf("at %s: %s", level, got)
		}
	}
}
