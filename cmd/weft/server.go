package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// server answers /metrics, /healthz and /readyz.
type server struct {
	http     http.Server
	listener net.Listener
	log      *slog.Logger
}

// checks are the questions a kubelet asks. Each returns what is wrong, or nil.
type checks struct {
	// healthy: is the process of use, or should it be restarted?
	healthy func() error
	// ready: does the node carry traffic?
	ready func() error
}

// listen claims the address, so that one in use is an error at start.
func listen(address string, log *slog.Logger) (*server, error) {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("serving metrics on %s: %w; choose another with --metrics-addr, or \"\" for none", address, err)
	}
	return &server{listener: listener, log: log}, nil
}

// Address is where the server listens.
func (s *server) Address() string { return s.listener.Addr().String() }

// Serve answers in the background until Close.
func (s *server) Serve(metrics prometheus.Gatherer, c checks) {
	s.http = http.Server{
		Handler: handler(metrics, c),
		// Anybody on the node's network can connect: nobody holds on for long.
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	go func() {
		if err := s.http.Serve(s.listener); !errors.Is(err, http.ErrServerClosed) {
			s.log.Error("metrics are no longer served", "error", err)
		}
	}()
}

// Close stops answering; a scrape under way gets a moment to end.
func (s *server) Close() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if err := s.http.Shutdown(ctx); err != nil {
		s.http.Close()
	}
	s.listener.Close() // in case Serve was never called
}

// handler routes requests.
func handler(metrics prometheus.Gatherer, c checks) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(metrics, promhttp.HandlerOpts{
		// A metric that is broken costs its own series, not the scrape.
		ErrorHandling:       promhttp.ContinueOnError,
		MaxRequestsInFlight: 4,
		Timeout:             20 * time.Second,
	}))
	mux.HandleFunc("GET /healthz", answer(c.healthy))
	mux.HandleFunc("GET /readyz", answer(c.ready))
	return mux
}

// answer makes a handler of a check.
func answer(check func() error) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		if err := check(); err != nil {
			w.WriteHeader(http.StatusServiceUnavailable)
			fmt.Fprintln(w, err)
			return
		}
		_, _ = io.WriteString(w, "ok\n")
	}
}
