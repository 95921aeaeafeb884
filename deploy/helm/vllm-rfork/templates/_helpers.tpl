{{- define "rfork.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-rfork" .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "rfork.planner" -}}{{ include "rfork.fullname" . }}-planner{{- end -}}
{{- define "rfork.redis" -}}{{ include "rfork.fullname" . }}-redis{{- end -}}
{{- define "rfork.scheme" -}}{{ ternary "https" "http" .Values.tls.enabled }}{{- end -}}

{{/* Labels that select pods: they never change. Argument: a dict with root and component. */}}
{{- define "rfork.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{/* Labels of pods: without the version, so that a new chart does not restart workers whose image is the same. */}}
{{- define "rfork.podLabels" -}}
{{ include "rfork.selector" . }}
app.kubernetes.io/part-of: rfork
{{- end -}}

{{- define "rfork.labels" -}}
{{ include "rfork.podLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
{{- end -}}

{{/* An image's reference. Argument: a dict with root, image, the name of the repository, and the end of the tag. */}}
{{- define "rfork.image" -}}
{{ .image.repository | default (printf "%s/%s" .root.Values.imageRegistry .name) }}:{{ .image.tag | default (printf "%s%s" .root.Chart.AppVersion .variant) }}
{{- end -}}

{{/* Fields of every pod. */}}
{{- define "rfork.podSpec" -}}
automountServiceAccountToken: false
# A Service named rfork-planner would set RFORK_PLANNER_PORT in all containers of the namespace.
enableServiceLinks: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Where pods run, if it is configured. */}}
{{- define "rfork.scheduling" -}}
{{- range $name := list "runtimeClassName" "schedulerName" "priorityClassName" "nodeSelector" "tolerations" "affinity" }}
{{- with get $ $name }}
{{ $name }}:{{ if kindIs "string" . }} {{ . }}{{ else }}{{ toYaml . | nindent 2 }}{{ end }}
{{- end }}
{{- end }}
{{- end -}}

{{/* The addresses of all replicas: workers use the one that answers. */}}
{{- define "rfork.plannerUrls" -}}
{{- $name := include "rfork.planner" . -}}
{{- $urls := list -}}
{{- range until (int .Values.planner.replicas) -}}
{{- $urls = append $urls (printf "%s://%s-%d.%s.%s.svc:%d" (include "rfork.scheme" $) $name . $name $.Release.Namespace (int $.Values.planner.port)) -}}
{{- end -}}
{{- join "," $urls -}}
{{- end -}}

{{/* The planner's settings as environment variables. */}}
{{- define "rfork.plannerSettings" -}}
{{- $own := dict "host" "0.0.0.0" "port" .Values.planner.port -}}
{{- if .Values.auth.enabled -}}{{- $_ := set $own "token_file" "/etc/rfork-token/token" -}}{{- end -}}
{{- if .Values.tls.enabled -}}
{{- $_ := set $own "tls_cert" "/etc/rfork-tls/tls.crt" -}}
{{- $_ := set $own "tls_key" "/etc/rfork-tls/tls.key" -}}
{{- end -}}
{{- range $name := keys $own | sortAlpha -}}
{{- if hasKey $.Values.planner.settings $name -}}{{- fail (printf "planner.settings.%s is set by the chart" $name) -}}{{- end -}}
{{- end -}}
{{- if or (hasKey .Values.planner.settings "store") (hasKey .Values.planner.settings "tls_client_ca") -}}
{{- fail "planner.settings has neither store (use planner.store) nor tls_client_ca (the probes have no certificate)" -}}
{{- end -}}
{{- $all := merge $own .Values.planner.settings -}}
{{- range $number, $name := keys $all | sortAlpha -}}
{{- if $number }}{{ "\n" }}{{ end -}}
RFORK_PLANNER_{{ upper $name }}: {{ get $all $name | toJson | trimAll "\"" | quote }}
{{- end -}}
{{- end -}}

{{/* Namespaces as peers of a NetworkPolicy. Argument: a list of names. */}}
{{- define "rfork.namespaces" -}}
- namespaceSelector:
    matchExpressions:
      - key: kubernetes.io/metadata.name
        operator: In
        values: {{ toJson . }}
{{- end -}}
