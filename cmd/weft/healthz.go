package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"time"
)

// flannelChecks answers flannel's /healthz and /readyz with flannel's words, for
// manifests that ask for them (--healthz-port).
type flannelChecks struct {
	http     http.Server
	listener net.Listener
}

func listenHealthz(ip string, port int, ready func() error, log *slog.Logger) (*flannelChecks, error) {
	address := net.JoinHostPort(ip, strconv.Itoa(port))
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("serving health checks on %s: %w; choose another with --healthz-ip and --healthz-port", address, err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, "flanneld is running")
	})
	mux.HandleFunc("/readyz", func(w http.ResponseWriter, _ *http.Request) {
		if ready() != nil {
			w.WriteHeader(http.StatusServiceUnavailable)
			_, _ = io.WriteString(w, "flanneld is not ready yet")
			return
		}
		_, _ = io.WriteString(w, "flanneld is ready")
	})
	c := &flannelChecks{listener: listener, http: http.Server{
		Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 10 * time.Second, MaxHeaderBytes: 16 << 10,
	}}
	go func() {
		if err := c.http.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			log.Error("health checks are no longer answered", "error", err)
		}
	}()
	log.Info("health checks served", "address", c.Address())
	return c, nil
}

// Address is where they are asked.
func (c *flannelChecks) Address() string { return c.listener.Addr().String() }

// Close stops answering.
func (c *flannelChecks) Close() { c.http.Close() }
